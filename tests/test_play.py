"""The interactive page of the book, in Chromium, from static files alone: what it draws is what PyTorch draws.

The page's own HTML is taken out of book/play.md and served without the book around it. Every host but the loopback is
blocked, and the server's Content-Security-Policy lets nothing but the page's own files in.
"""

import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers_browser import LOOPBACK_ONLY, missing

from ldm_minimal import LatentDiffusion
from ldm_minimal.schedule import add_noise, cosine, log_snr, time_grid

ROOT = Path(__file__).parent.parent
POLICY = ("default-src 'none'; script-src 'self' 'wasm-unsafe-eval' blob:; worker-src 'self'; connect-src 'self'; img-src 'self' data:; "
          "style-src 'self' 'unsafe-inline'")
HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>play</title>' \
       '<link rel="icon" href="data:,"><body><main><h1>Play</h1>'
CASES = [  # (label, guidance, steps, seed, solver); 10 is the null label
    (9, 1.25, 20, 0, "dpm++2m"), (3, 1.0, 5, 1, "dpm++2m"), (7, 0.0, 8, 2, "dpm++2m"), (10, 2.5, 8, 3, "ddim"), (8, 4.0, 12, 4, "dpm++2m"),
    (0, 4.0, 7, 5, "ddim"), (5, 2.0, 1, 6, "dpm++2m"), (6, 1.5, 2, 99, "dpm++2m"), (1, 1.0, 50, 7, "ddim"),
]


def book(name: str):
    """A script of the book as a module."""
    if str(ROOT / "book") not in sys.path:
        sys.path.insert(0, str(ROOT / "book"))
    return importlib.import_module(name.replace("/", "."))


@pytest.fixture(scope="module")
def export():
    if not importlib.util.find_spec("onnx"):
        missing("onnx is not installed: pip install -r book/requirements.txt")
    module = book("play/export")
    if not module.RUNTIME.is_dir():
        try:
            book("build").packages()
        except (OSError, subprocess.CalledProcessError) as error:
            missing(f"ONNX Runtime Web is not in book/node_modules and cannot be installed: {error}")
    return module


@pytest.fixture(scope="module")
def site(export, tmp_path_factory):
    """A folder with the page and what it loads."""
    folder = tmp_path_factory.mktemp("site")
    export.export(folder / "_static" / "play")
    parts = re.findall(r"(?ms)^```\{raw\} html\n(.*?)^```", (ROOT / "book" / "play.md").read_text(encoding="utf-8"))
    (folder / "index.html").write_text(HEAD + "".join(parts) + "</main>", encoding="utf-8")
    return folder


class Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):
        self.send_header("Content-Security-Policy", POLICY)
        super().end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if not importlib.util.find_spec("playwright"):
        missing("playwright is not installed: pip install -r book/requirements.txt")
    from playwright.sync_api import sync_playwright
    try:
        program, environment = book("browser").find()
    except LookupError as error:
        missing(str(error))
    with sync_playwright() as player:
        running = player.chromium.launch(executable_path=program, env=os.environ | environment, args=LOOPBACK_ONLY)
        yield running
        running.close()


@pytest.fixture(scope="module")
def page(browser, address):
    """The page, running. Whatever it complained about by the end is a failure."""
    shown, complaints = browser.new_page(), []
    listen(shown, complaints)
    shown.goto(address)
    shown.wait_for_selector("body[data-play-state=ready]", timeout=120_000)
    yield shown
    assert complaints == []


def listen(shown, complaints: list) -> None:
    shown.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("requestfailed", lambda request: complaints.append(request.url))
    shown.on("response", lambda response: complaints.append(response.url) if response.status >= 400 else None)


@pytest.fixture(scope="module")
def model():
    return LatentDiffusion.pretrained()


@pytest.fixture(scope="module")
def ask(page):
    """ask([(job, request), ...]) -> each last answer of a worker of our own, one after the other."""
    page.evaluate("""() => new Promise(resolve => {
        window.own = new Worker("_static/play/play.js", { type: "module" });
        window.own.onmessage = () => resolve();
        window.one = (job, request, id) => new Promise((resolve, reject) => {
            window.own.onmessage = ({ data }) => {
                if (data.error) reject(data.error);
                if (data.id === id && data.done) resolve(Object.fromEntries(
                    Object.entries(data).map(([key, value]) => [key, ArrayBuffer.isView(value) ? [...value] : value])));
            };
            window.own.postMessage({ id, job, channel: "test", ...request });
        }); })""")
    count = 0

    def one(job: str, **request) -> dict:
        nonlocal count
        count += 1
        return page.evaluate("([job, request, id]) => window.one(job, request, id)", [job, request, count])
    return one


def test_the_files_are_small(site):
    sizes = {path.name: path.stat().st_size / 1e6 for path in (site / "_static" / "play").iterdir()}
    assert sum(sizes.values()) <= 25, sizes
    assert sizes["unet.onnx"] < 8.5 and sizes["decoder.onnx"] < 1.5, "weights are stored as float16"


def test_the_noise_is_that_of_the_export_and_normal(page, export):
    found = page.evaluate("""async () => { const { noise } = await import("/_static/play/play.js");
        return [[0, 0], [0, 3], [99, 1]].map(([seed, index]) => [...noise(seed, index, 197)]) }""")
    for (seed, index), values in zip([(0, 0), (0, 3), (99, 1)], found):
        torch.testing.assert_close(torch.tensor(values), export.noise(seed, index, (197,)), atol=1e-6, rtol=1e-6)
    drawn = torch.stack([export.noise(seed, index, (196,)) for seed in range(20) for index in range(4)])  # (80, 196)
    assert abs(drawn.mean()) < 0.03 and abs(drawn.std() - 1) < 0.03 and abs(drawn.pow(4).mean() - 3) < 0.3
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.35, "pictures and seeds are unrelated"  # 5 / sqrt(196)
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 0.65, "so are the values of one"  # 5.8 / sqrt(80)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])
def test_schedule_and_grid_are_those_of_the_package(page, site, steps):
    middle = json.loads((site / "_static" / "play" / "play.json").read_text())["middle"]
    times, rates = page.evaluate("""async ([steps, middle]) => { const { timeGrid, cosine } = await import("/_static/play/play.js");
        const times = timeGrid(steps, middle); return [times, times.map(cosine)] }""", [steps, middle])
    expected = time_grid(steps, cosine, "middle")
    torch.testing.assert_close(torch.tensor(times, dtype=torch.float64), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64).T, torch.stack(cosine(expected)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("label, guidance, steps, seed, solver", CASES)
def test_the_page_draws_what_the_package_draws(ask, model, export, label, guidance, steps, seed, solver):
    order = 2 if solver == "dpm++2m" else 1
    answer = ask("draw", label=label, guidance=guidance, steps=steps, seed=seed, order=order, count=4, frames=3)
    z0, images = export.draw(model, label, steps, guidance, solver, seed)
    torch.testing.assert_close(torch.tensor(answer["z0"]).reshape(z0.shape), z0, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(answer["images"]).reshape(images.shape), images, atol=2e-4, rtol=0)


@pytest.mark.parametrize("test, t", [(0, 0.0), (3, 0.25), (9, 0.6), (5, 1.0)])
def test_noising_is_that_of_the_package(ask, model, export, site, test, t):
    entry = json.loads((site / "_static" / "play" / "play.json").read_text())["tests"][test]
    answer = ask("noised", test=test, t=t, seed=11)
    z0 = torch.tensor(entry["latent"]).reshape(1, *model.latent_shape)
    times = torch.tensor([t], dtype=torch.float64)
    zt = add_noise(z0, export.noise(11, 0, model.latent_shape)[None], times, cosine).float()
    with torch.no_grad():
        guess = model.denoise(zt, times, torch.tensor([entry["label"]]))
    torch.testing.assert_close(torch.tensor(answer["zt"]), zt.flatten(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(answer["guess"]), guess.flatten(), atol=1e-4, rtol=0)
    expected = model.decode(torch.cat([z0, zt, guess])).flatten()
    torch.testing.assert_close(torch.tensor(answer["images"]), expected, atol=2e-4, rtol=0)


# what the page's text says that one sees

def test_what_the_text_says_of_the_three_experiments(export, model):
    def drawn(label, guidance=1.25, steps=20, solver="dpm++2m"):
        return export.draw(model, label, steps, guidance, solver, seed=0, count=16)[1].flatten(1)

    def distance(a, b):
        return (a - b).square().mean().sqrt()

    assert torch.equal(drawn(6, 0), drawn(9, 0)), "at guidance 0 the label is not heard"
    assert torch.pdist(drawn(6, 0)).mean() > torch.pdist(drawn(6, 1)).mean() > torch.pdist(drawn(6, 4)).mean()
    once, few, some, end = (drawn(8, 1, steps) for steps in (1, 3, 10, 50))
    assert torch.pdist(once).mean() < 0.2 * torch.pdist(end).mean(), "one step draws nearly the same picture each time"
    assert distance(once, end) > 1.5 * distance(few, end) > 5 * distance(some, end)
    some, end = (drawn(8, steps=steps) for steps in (10, 50))
    assert distance(drawn(8, steps=50, solver="ddim"), end) > 0.5 * distance(some, end), "fifty steps of DDIM are worth about ten"
    assert distance(drawn(8, steps=5, solver="ddim"), end) > 1.2 * distance(drawn(8, steps=5), end)
    darkness = torch.stack([drawn(label).mean(1) for label in (0, 3)])
    assert torch.corrcoef(darkness)[0, 1] > 0.4, "the noise decides part of how dark a picture is"


# what a reader does

def pixels(page) -> list:
    return page.evaluate("[...document.querySelectorAll('.play-pictures button canvas')].map(canvas => canvas.toDataURL())")


def wait_for(page, form: str, **wanted) -> None:
    page.wait_for_function("""([form, wanted]) => { const done = JSON.parse(document.querySelector(`[data-play=${form}]`).dataset.done || "{}");
        return Object.entries(wanted).every(([key, value]) => done[key] === value) }""", arg=[form, wanted], timeout=120_000)


def test_sliders_change_the_pictures_by_mouse_and_by_keyboard(page):
    page.fill("#play-steps", "3")
    wait_for(page, "draw", steps=3)
    before = pixels(page)
    assert len(set(before)) == 4, "four noises, four pictures"
    page.focus("#play-guidance")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    wait_for(page, "draw", guidance=2.25)
    guided = pixels(page)
    assert all(a != b for a, b in zip(before, guided))
    assert page.text_content("output[for=play-guidance]") == "2.25"
    assert "6 evaluations" in page.text_content("[data-play=status]")
    page.get_by_text("none", exact=True).click()
    wait_for(page, "draw", label=10)
    assert "no class asked for" in page.text_content("[data-play=status]") and "3 evaluations" in page.text_content("[data-play=status]")
    page.fill("#play-seed", "5")
    wait_for(page, "draw", seed=5)
    assert not set(pixels(page)) & set(guided + before)
    page.fill("#play-seed", "0")
    page.fill("#play-guidance", "1.25")
    page.locator("[name=label]").nth(9).check(force=True)
    wait_for(page, "draw", seed=0, guidance=1.25, label=9)
    assert pixels(page) == before, "the same settings draw the same pictures"


def test_a_slider_that_moves_on_cancels_the_run(page):
    page.fill("#play-steps", "50")
    page.wait_for_function("() => document.querySelector('[data-play=progress]').value > 0.02")
    page.fill("#play-steps", "2")
    wait_for(page, "draw", steps=2)
    assert len(page.query_selector_all(".play-film canvas")) == 2


def test_with_reduced_motion_the_pictures_change_once(page):
    page.emulate_media(reduced_motion="reduce")
    before = pixels(page)
    page.fill("#play-steps", "12")
    page.wait_for_function("() => document.querySelector('[data-play=progress]').value == 0.5")
    halfway = pixels(page)
    wait_for(page, "draw", steps=12)
    assert halfway == before != pixels(page)
    page.emulate_media(reduced_motion="no-preference")


def test_t_shows_noise_and_prints_the_rates(page):
    panels = "[...document.querySelectorAll('[data-play=panel]')].map(canvas => canvas.toDataURL())"
    seen = []
    for t in (0, 0.5, 0.97):
        page.fill("#play-t", str(t))
        wait_for(page, "noising", t=t)
        seen.append(page.evaluate(panels))
        alpha, sigma = cosine(torch.tensor(t, dtype=torch.float64))
        texts = [page.text_content(f"[data-play={name}]").replace("−", "-") for name in ("alpha", "sigma", "snr")]
        assert texts[:2] == [f"{alpha:.3f}", f"{sigma:.3f}"]
        assert texts[2] == ("+∞" if t == 0 else f"{log_snr(alpha, sigma):.2f}")
    assert seen[0][:2] == seen[1][:2] == seen[2][:2], "the image and its reconstruction stay"
    assert seen[0][1] == seen[0][2] == seen[0][3], "without noise there is nothing to guess"
    assert len({panels[2] for panels in seen}) == len({panels[3] for panels in seen}) == 3


def test_each_experiment_draws_its_rows(page):
    for box in page.query_selector_all("[data-rows]"):
        box.query_selector("button").click()
    for box in page.query_selector_all("[data-rows]"):
        box.wait_for_selector("button:not([aria-disabled=true])", timeout=240_000)
        rows = json.loads(box.get_attribute("data-rows"))
        assert [span.text_content() for span in box.query_selector_all(".play-rows span")] == [row["caption"] for row in rows]
        shown = box.evaluate("box => [...box.querySelectorAll('canvas')].map(canvas => canvas.toDataURL())")
        assert len(set(shown)) == 4 * len(rows)


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_runs_over_the_edge(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_control_and_picture_has_a_name(page):
    unnamed = page.evaluate("""[...document.querySelectorAll("input, canvas, img, svg, progress, form, button")].filter(each => !(
        each.labels?.length || each.ariaLabel || each.alt || each.textContent.trim() || each.querySelector("[aria-label]"))
        ).map(each => each.outerHTML)""")
    assert unnamed == []
    axe = ROOT / "book" / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.is_file():
        missing("axe-core is not there: run `npm ci` in book/")
    for theme in ("light", "dark"):
        page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
        page.evaluate(axe.read_text(encoding="utf-8"))
        found = page.evaluate("async () => (await axe.run('.play')).violations.map(each => [each.id, each.nodes.map(node => node.html)])")
        assert found == []


@pytest.mark.parametrize("how", ["no JavaScript", "no WebAssembly", "a file is missing"])
def test_where_it_cannot_run_it_says_so_and_shows_a_picture(browser, address, how):
    context = browser.new_context(java_script_enabled=how != "no JavaScript")
    shown = context.new_page()
    if how == "no WebAssembly":
        context.route("**/*.wasm", lambda route: route.fulfill(body=b"nothing", content_type="application/wasm"))
    if how == "a file is missing":
        context.route("**/unet.onnx", lambda route: route.abort())
    shown.goto(address)
    if how != "no JavaScript":
        shown.wait_for_selector("body[data-play-state=failed]", timeout=120_000)
    assert shown.locator(".play-notice").is_visible() and "WebAssembly" in shown.text_content(".play-notice")
    picture = shown.locator(".play-still")
    assert picture.is_visible() and picture.bounding_box()["width"] > 300 and picture.get_attribute("alt")
    assert not shown.locator("#play-guidance").is_visible()
    context.close()
