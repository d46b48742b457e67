"""The book, built once, served on the loopback and read in Chromium, with every other host blocked.

`look` opens a page as a reader on a phone (390 px, dark) and at a desk (1280 px, light) and returns all defects that it finds. Pages
with planted defects go through the same function.
"""

import asyncio
import functools
import http.server
import importlib
import importlib.util
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from helpers_browser import LOOPBACK_ONLY, missing

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
sys.path.insert(0, str(BOOK))

import browser  # noqa: E402

AT_ONCE = 3  # pages
ELSEWHERE = ("https://arxiv.org/abs/", "https://colab.research.google.com", "https://huggingface.co/docs/diffusers",
             "https://onnxruntime.ai", "https://github.com/")
SIZES = ((390, "dark"), (1280, "light"))
SEE = """() => {
  const text = document.querySelector("article, main")?.innerText ?? "";
  const raw = [...document.querySelectorAll(".bd-article p, .bd-article li, .bd-article td")]
    .filter(each => !each.querySelector("code, pre")).map(each => each.innerText).filter(words => /\\\\\\(|\\\\\\[|\\$[^$\\d][^$]*\\$/.test(words));
  return {
    maths: [...document.querySelectorAll(".math")].filter(each => !each.querySelector("mjx-container")).map(each => each.textContent).concat(
           [...document.querySelectorAll("mjx-merror, [data-mml-node=merror]")].map(each => each.textContent), raw),
    images: [...document.images].filter(each => each.loading != "lazy" && !each.naturalWidth).map(each => each.src),
    alts: [...document.images].filter(each => (each.getAttribute("alt") ?? "").trim().length < 4).map(each => each.src),
    links: [...document.querySelectorAll("a[href]")].map(each => each.getAttribute("href")),
    ids: [...document.querySelectorAll("[id]")].map(each => each.id),
    title: document.title, words: text.split(/\\s+/).length,
  };
}"""
WIDE = """() => {
  const wide = document.documentElement.scrollWidth, room = window.innerWidth;
  if (wide <= room) return [];
  const over = [...document.querySelectorAll("body *")].filter(each => each.getBoundingClientRect().right > room + 1);
  return [`${wide} px in ${room}: ` + over.slice(0, 3).map(each => each.outerHTML.slice(0, 90)).join(" | ")];
}"""
AXE = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
  .filter(each => ["serious", "critical"].includes(each.impact))
  .map(each => `${each.id} (${each.impact}): ` + each.nodes.slice(0, 3).map(node => node.html.slice(0, 120)).join(" | "))"""


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """(the folder of the built book, the seconds that this took)."""
    for name in ("sphinx", "myst_nb", "sphinx_book_theme", "playwright"):
        if not importlib.util.find_spec(name):
            missing(f"{name} is not installed: pip install -r book/requirements.txt")
    import build
    began = time.perf_counter()
    out = build.build(tmp_path_factory.mktemp("book"))
    return out, time.perf_counter() - began


@pytest.fixture(scope="session")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site[0]))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def names(site: Path) -> list[str]:
    return sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if "_static" not in path.parts)


async def look(chromium, address: str, name: str, axe: str) -> dict:
    """All that is wrong with one page: {kind of defect: [what]}; and under "seen" its links and ids."""
    defects: dict[str, list] = {kind: [] for kind in ("leaves", "console", "missing", "maths", "images", "alts", "wide", "axe")}
    context = await chromium.new_context(viewport={"width": SIZES[0][0], "height": 844}, color_scheme=SIZES[0][1], reduced_motion="reduce")

    async def guard(route):
        url = route.request.url
        if url.startswith((address, "data:", "blob:")):
            return await route.continue_()
        defects["leaves"].append(url)
        await route.abort()

    await context.route("**/*", guard)
    page = await context.new_page()
    page.on("console", lambda said: defects["console"].append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: defects["console"].append(str(error)))
    page.on("response", lambda answer: defects["missing"].append(answer.url) if answer.status >= 400 else None)
    await page.goto(address + name, wait_until="load")
    await page.evaluate("() => window.MathJax?.startup?.promise")
    await page.add_style_tag(content="* { transition: none !important; animation: none !important }")
    if name == "play.html":
        await page.wait_for_selector("body[data-play-state=ready]", timeout=120_000)
    await page.evaluate(axe)
    for width, theme in SIZES:
        await page.set_viewport_size({"width": width, "height": 900})
        await page.emulate_media(color_scheme=theme)
        await page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 400)))")
        defects["wide"] += await page.evaluate(WIDE)
        defects["axe"] += [f"{width} px, {theme}: {found}" for found in await page.evaluate(AXE)]
    seen = await page.evaluate(SEE)
    for kind in ("maths", "images", "alts"):
        defects[kind] += seen[kind]
    await context.close()
    return {**defects, "seen": seen}


def in_browser(work):
    """Run `await work(chromium)` with a Chromium that can reach nothing but the loopback."""
    async def run():
        from playwright.async_api import async_playwright
        async with async_playwright() as player:
            program, environment = browser.find()
            chromium = await player.chromium.launch(executable_path=program, env=os.environ | environment, args=LOOPBACK_ONLY)
            try:
                return await work(chromium)
            finally:
                await chromium.close()

    try:
        return asyncio.run(run())
    except LookupError as error:
        return missing(str(error))


def look_at(address: str, pages: list[str]) -> dict[str, dict]:
    axe = (BOOK / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")

    async def work(chromium):
        free = asyncio.Semaphore(AT_ONCE)

        async def one(name):
            async with free:
                return name, await look(chromium, address, name, axe)

        return dict(await asyncio.gather(*map(one, pages)))

    return in_browser(work)


@pytest.fixture(scope="session")
def found(site, address):
    began = time.perf_counter()
    result = look_at(address, names(site[0]))
    print(f"{len(result)} pages in {time.perf_counter() - began:.0f} s")
    return result


def broken_links(found: dict, site: Path, address: str) -> list[str]:
    """Links to pages, files or anchors that do not exist, and to hosts that nobody has agreed to."""
    ids, broken = {name: set(page["seen"]["ids"]) for name, page in found.items()}, []
    for name, page in found.items():
        for href in set(page["seen"]["links"]):
            if href.startswith(("http://", "https://")):
                if not href.startswith(ELSEWHERE):
                    broken.append(f"{name}: {href} (a host that is not listed in this test)")
                continue
            target, anchor = urldefrag(urljoin(address + name, href))
            path = unquote(target.removeprefix(address)) or "index.html"
            if not (site / path).is_file():
                broken.append(f"{name}: {href}")
            elif anchor and path in ids and unquote(anchor) not in ids[path]:
                broken.append(f"{name}: {href} (no such anchor)")
    return sorted(broken)


# --- the whole book

def test_it_is_built_in_time_and_is_small(site):
    import build
    assert site[1] <= 180, f"{site[1]:.0f} s"
    assert build.megabytes(site[0]) <= build.LIMIT_MB
    assert len(names(site[0])) >= 40


@pytest.mark.parametrize("kind, what", [
    ("leaves", "a request to another host"), ("console", "an error in the console"), ("missing", "a file that is not there"),
    ("maths", "a formula that is not rendered"), ("images", "a picture that is not there"), ("alts", "a picture without a text"),
    ("wide", "a page wider than the screen"), ("axe", "a barrier, serious or critical")])
def test_no_page_has(found, kind, what):
    assert {name: page[kind] for name, page in found.items() if page[kind]} == {}, what


def test_every_link_leads_somewhere(found, site, address):
    assert broken_links(found, site[0], address) == []


def test_every_page_says_something(found):
    titles = [page["seen"]["title"] for page in found.values()]
    assert all(len(title) > 10 for title in titles) and len(set(titles)) >= 0.9 * len(titles)
    assert all(page["seen"]["words"] > 40 for name, page in found.items() if name not in ("search.html", "genindex.html", "py-modindex.html"))


# --- what a chapter's page offers

CHAPTERS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_has_its_bar_and_its_neighbors(site, chapter):
    html = (site[0] / "chapters" / f"{chapter}.html").read_text(encoding="utf-8")
    bar = re.search(r'(?s)<p class="chapter-bar">(.*?)</p>', html)[1]
    assert "Open in Colab" in bar and f'href="../notebooks/{chapter}.ipynb"' in bar and re.search(r"Runs in [\d.]+ (s|min)\b", bar)
    stored = json.loads((site[0] / "notebooks" / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    original = json.loads((ROOT / "notebooks" / f"{chapter}.ipynb").read_text(encoding="utf-8"))
    assert [cell["source"] for cell in stored["cells"]] == [cell["source"] for cell in original["cells"]]
    assert 'rel="next"' in html and 'rel="prev"' in html


def test_with_a_public_address_the_bar_opens_colab(monkeypatch):
    import build
    monkeypatch.setattr(build.keeper, "address", lambda: "https://github.com/name/repository")
    for name in ("05_guidance", "solutions/05_guidance"):
        path = ROOT / "notebooks" / f"{name}.ipynb"
        there = f"https://colab.research.google.com/github/name/repository/blob/main/notebooks/{name}.ipynb"
        assert f"[Open in Colab]({there})" in build.bar(path, build.keeper.read(path))


def test_the_reader_can_search_copy_and_switch_to_dark(address):
    async def work(chromium):
        page = await chromium.new_page()
        await page.goto(address + "search.html?q=reparameterization")
        await page.wait_for_selector("#search-results li a")
        hits = await page.eval_on_selector_all("#search-results li a", "each => each.map(link => link.href)")
        await page.goto(hits[0])
        text = (await page.inner_text("article")).lower()
        await page.goto(address + "chapters/01_vae.html")
        buttons = await page.eval_on_selector_all("button.copybtn", "each => each.length")
        before = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        await page.click("button.theme-switch-button:visible")
        await page.click("button.theme-change-button[data-mode=dark]:visible")
        after = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        return hits, text, buttons, before, after

    hits, text, buttons, before, after = in_browser(work)
    assert any("glossary" in hit or "01_vae" in hit for hit in hits) and "reparameteri" in text
    assert buttons >= 20 and before != after


# --- a check that cannot fail is a defect

PLANTS = {
    "leaves": '<img src="https://example.org/x.png" alt="an image from elsewhere">',
    "console": '<script>console.error("planted")</script>',
    "missing": '<img src="_static/nowhere.png" alt="a picture that is missing">',
    "images": '<img src="_static/nowhere.png" alt="a picture that is missing">',
    "alts": '<img src="_static/plus.png">',
    "maths": '<p>A formula \\(\\alpha\\) that nobody renders.</p>',
    "wide": '<div style="width: 1400px">wide</div>',
    "axe": '<p style="color: #999; background: #aaa">hard to read</p>',
}


@pytest.fixture(scope="session")
def planted(site, address, found):
    """One page with nothing planted, and one for each defect."""
    html = (site[0] / "changelog.html").read_text(encoding="utf-8")
    for kind, plant in {"none": "", **PLANTS, "links": '<a href="nowhere.html">x</a> <a href="index.html#nowhere">y</a>'}.items():
        at = html.index("</article>")
        (site[0] / f"planted-{kind}.html").write_text(html[:at] + plant + html[at:], encoding="utf-8")
    return look_at(address, [f"planted-{kind}.html" for kind in ("none", *PLANTS, "links")])


@pytest.mark.parametrize("kind", PLANTS)
def test_a_planted_defect_is_found(planted, kind):
    assert not planted["planted-none.html"][kind]
    assert planted[f"planted-{kind}.html"][kind]


def test_planted_broken_links_are_found(planted, found, site, address):
    page = {"planted-links.html": planted["planted-links.html"], "index.html": found["index.html"]}
    assert {"planted-links.html: nowhere.html", "planted-links.html: index.html#nowhere (no such anchor)"} <= set(broken_links(page, site[0], address))


# --- what the pages say

def text_of(path: Path) -> str:
    if path.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])
    return path.read_text(encoding="utf-8")


def test_the_bibliography_has_what_is_cited_and_nothing_else():
    bib = (BOOK / "references.bib").read_text(encoding="utf-8")
    known = set(re.findall(r"(?m)^@\w+\{([\d.]+),", bib))
    places = [*ROOT.glob("notebooks/**/*.ipynb"), *BOOK.glob("*.md"), *BOOK.glob("pages/*.md"), *ROOT.glob("ldm_minimal/*.py")]
    numbers = re.compile(r"(?<![\w./])((?:0[7-9]|1\d|2[0-6])(?:0[1-9]|1[0-2])\.\d{4,5})(?!\w)")
    cited = {number for place in places for number in numbers.findall(re.sub(r"arxiv\.org/abs/|\*", "", text_of(place)))}
    assert cited - known == set() and known - cited == set()
    assert len(re.findall("eprint", bib)) == len(known)


def test_the_glossary_is_complete():
    text = (BOOK / "pages" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"(?m)^(\S.*)\n  (.*)$", text.partition("```{glossary}\n")[2])
    assert 30 <= len(terms) <= 60 and "reparameterization" in dict(terms)
    assert [term for term, _ in terms] == sorted((term for term, _ in terms), key=lambda term: term.lower().replace("é", "e"))
    for term, meaning in terms:
        assert re.search(r"\(Chapter \[\d+\]\(chapters/\d\d_\w+\.ipynb\)\.\)", meaning), term


def test_the_names_of_diffusers_exist():
    pytest.importorskip("diffusers")
    text = (BOOK / "pages" / "diffusers.md").read_text(encoding="utf-8")
    dotted = set(re.findall(r"`(diffusers\.[\w.]+)", text))
    assert len(dotted) >= 12
    for name in dotted:
        module, _, attribute = name.rpartition(".")
        try:
            known = hasattr(importlib.import_module(module), attribute) or bool(importlib.import_module(name))
        except ModuleNotFoundError:
            known = False
        assert known, name
    options = {"AutoencoderKL": ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention", "block_out_channels", "layers_per_block",
                                 "latent_channels", "scaling_factor", "shift_factor"),
               "VQModel": ("num_vq_embeddings",), "DDPMScheduler": ("beta_schedule", "clip_sample", "prediction_type", "timestep_spacing"),
               "DDIMScheduler": ("set_alpha_to_one",), "DPMSolverMultistepScheduler": ("solver_order", "algorithm_type", "final_sigmas_type"),
               "UNet2DModel": ("num_class_embeds", "resnet_time_scale_shift", "norm_num_groups", "down_block_types", "up_block_types"),
               "DiTTransformer2DModel": ("num_embeds_ada_norm",), "FlowMatchEulerDiscreteScheduler": ("shift",),
               "ClassifierFreeGuidance": ("guidance_scale", "guidance_rescale", "start", "stop")}
    import inspect

    import diffusers
    for name, arguments in options.items():
        assert set(arguments) <= inspect.signature(getattr(diffusers, name)).parameters.keys(), name
        assert all(f"`{argument}" in text or argument in text for argument in arguments), name
