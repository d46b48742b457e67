// The interactive page: the model of this book in a browser. To be read from top to bottom:
//
//   1. the mathematics   noise, schedule, grid of times, denoiser, guidance, sampler, as in ldm_minimal
//   2. the worker        runs the two exported networks (unet.onnx, decoder.onnx) with ONNX Runtime Web
//   3. the page          sliders in, pictures out
//
// The page loads this file and starts a worker from the same file, so that computing never holds up the sliders.
// export.py writes what it loads; tests/test_play.py compares what comes out with PyTorch.

// --- 1. the mathematics

// [mathematics]
// The schedule: z_t = alpha z0 + sigma eps, from t = 0 (data) to t = 1 (noise).
const cosine = t => [Math.max(0, Math.cos(t * Math.PI / 2)), Math.sin(t * Math.PI / 2)];
const logSnr = ([alpha, sigma]) => Math.log(alpha) - Math.log(sigma);

// From t = 1 to t = 0 in `steps` steps, evenly in log-SNR from low to high in between.
function timeGrid(steps, [low, high]) {
  const times = [1];
  for (let i = 1; i < steps; i++) {
    const target = low + (high - low) * i / (steps - 1);
    times.push(2 / Math.PI * Math.atan(Math.exp(-target)));  // where logSnr(cosine(t)) = target
  }
  return [...times, 0];
}

// The network predicts v = alpha eps - sigma z0. With z_t, that gives an estimate of z0.
const denoiser = net => async (zt, t, labels) => {
  const [alpha, sigma] = cosine(t);
  const v = await net(zt, t, labels);
  return zt.map((z, i) => alpha * z - sigma * v[i]);
};

// Classifier-free guidance: with and without the label in one batch; away from "without".
const guide = (denoise, none, scale) => async (zt, t, labels) => {
  const hidden = labels.map(() => none);
  if (scale === 1 || labels.every(y => y === none)) return denoise(zt, t, labels);
  if (scale === 0) return denoise(zt, t, hidden);
  const both = await denoise(Float32Array.of(...zt, ...zt), t, [...labels, ...hidden]);
  const cond = both.subarray(0, zt.length), uncond = both.subarray(zt.length);
  return uncond.map((u, i) => u + scale * (cond[i] - u));
};

// The sampler. Order 1 is DDIM. Order 2 is DPM-Solver++(2M): it carries the estimate on
// along its last change. The last step goes to t = 0, where z_t is the estimate itself.
async function* sample(denoise, zt, labels, times, order) {
  let last, hLast;
  for (let i = 0; i + 1 < times.length; i++) {
    const now = cosine(times[i]), next = cosine(times[i + 1]);
    const z0 = await denoise(zt, times[i], labels);
    const h = logSnr(next) - logSnr(now);
    const ratio = order === 2 && last && times[i + 1] > 0 ? h / (2 * hLast) : 0;
    zt = zt.map((z, k) => {
      const guess = ratio ? z0[k] + ratio * (z0[k] - last[k]) : z0[k];
      const eps = (z - now[0] * guess) / now[1];
      return next[0] * guess + next[1] * eps;
    });
    [last, hLast] = [z0, h];
    yield { step: i + 1, t: times[i], z0 };
  }
}
// [/mathematics]

// A 32-bit number to another that looks unrelated: a step of the golden ratio, then MurmurHash3's finalizer.
function mix(x) {
  let h = (x + 0x9e3779b9) | 0;
  h = Math.imul(h ^ h >>> 16, 0x85ebca6b);
  h = Math.imul(h ^ h >>> 13, 0xc2b2ae35);
  return (h ^ h >>> 16) >>> 0;
}

// n standard normal numbers for picture `index` of a seed, by Box and Muller: two uniforms make two normals.
function noise(seed, index, n) {
  const uniform = k => (mix(mix(mix(seed) + index) + k) + 0.5) / 2 ** 32;
  return Float32Array.from({ length: n }, (_, k) => {
    const first = k - k % 2, radius = Math.sqrt(-2 * Math.log(uniform(first))), angle = 2 * Math.PI * uniform(first + 1);
    return radius * (k % 2 ? Math.sin(angle) : Math.cos(angle));
  });
}

const evaluations = ({ steps, guidance, label }, none) => steps * (guidance === 0 || guidance === 1 || label === none ? 1 : 2);

// --- 2. the worker

const beside = name => new URL(name, import.meta.url).href;

async function work() {
  const ort = await import("./ort.js");
  ort.env.wasm.numThreads = 1;  // more would need special headers from the host
  ort.env.wasm.wasmPaths = { wasm: beside("ort-wasm-simd-threaded.wasm") };
  ort.env.logLevel = "error";
  const model = await (await fetch(beside("play.json"))).json();
  const open = name => ort.InferenceSession.create(beside(name), { executionProviders: ["wasm"] });
  const unet = await open("unet.onnx"), decoder = await open("decoder.onnx");
  const size = model.latent.reduce((a, b) => a * b);

  let turn = Promise.resolve();  // one evaluation at a time
  const run = (session, inputs) => turn = turn.then(() => session.run(inputs));
  const latents = z => new ort.Tensor("float32", z, [z.length / size, ...model.latent]);
  const net = async (zt, t, labels) => (await run(unet, {
    zt: latents(zt), t: new ort.Tensor("float32", new Float32Array(labels.length).fill(t), [labels.length]),
    y: new ort.Tensor("int64", BigInt64Array.from(labels, BigInt), [labels.length]),
  })).out.data;
  const decode = async z => (await run(decoder, { z: latents(z.map(value => value / model.scale)) }))
    .x.data.map(value => Math.min(1, Math.max(-1, value)));
  const denoise = denoiser(net);

  const jobs = {
    // `count` pictures, step by step; the estimates of at most `frames` steps are decoded on the way
    async draw({ label, guidance, steps, seed, order, count, frames }, send, cancelled) {
      const labels = Array(count).fill(label);
      const start = Float32Array.from(labels.flatMap((_, i) => [...noise(seed, i, size)]));
      const gaps = Math.min(frames, steps) - 1;  // steps 1 ... `steps`, evenly, and always the last
      const shown = new Set([steps, ...Array.from({ length: gaps }, (_, i) => 1 + Math.round(i * (steps - 1) / gaps))]);
      const times = timeGrid(steps, model.middle);
      for await (const { step, t, z0 } of sample(guide(denoise, model.null, guidance), start, labels, times, order)) {
        if (cancelled()) return;
        send({ step, t, z0, images: shown.has(step) ? await decode(z0) : null, done: step === steps });
        await new Promise(resolve => setTimeout(resolve));  // let a newer request come in
      }
    },
    // a test image's latent at time t: itself, with noise, and what the denoiser makes of it
    async noised({ test, t, seed }, send) {
      const z0 = Float32Array.from(model.tests[test].latent), eps = noise(seed, 0, size), [alpha, sigma] = cosine(t);
      const zt = z0.map((z, i) => alpha * z + sigma * eps[i]);
      const guess = await denoise(zt, t, [model.tests[test].label]);
      send({ zt, guess, images: await decode(Float32Array.of(...z0, ...zt, ...guess)), done: true });
    },
  };
  const newest = {};  // of each channel, the number of the last request: older ones stop
  self.onmessage = async ({ data: { id, channel, job, ...request } }) => {
    newest[channel] = id;
    await new Promise(resolve => setTimeout(resolve));  // take in what else has arrived
    const cancelled = () => newest[channel] !== id;
    if (cancelled()) return;
    try {
      await jobs[job](request, answer => cancelled() || postMessage({ id, ...answer }), cancelled);
    } catch (error) {
      postMessage({ id, error: String(error) });
    }
  };
  postMessage({ model });
}

// --- 3. the page

const COUNT = 4, FRAMES = 10;  // pictures at a time, and estimates shown on the way

function page() {
  const $ = name => document.querySelector(`[data-play="${name}"]`);
  const $$ = name => [...document.querySelectorAll(`[data-play="${name}"]`)];
  const state = word => { document.body.dataset.playState = word; };  // loading, ready or failed: play.css shows what fits
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const worker = new Worker(beside("play.js"), { type: "module" });
  const answers = new Map();
  let model, requests = 0;

  function ask(channel, job, request, answer) {
    answers.set(++requests, answer);
    worker.postMessage({ id: requests, channel, job, ...request });
  }

  function fail(what) {
    state("failed");
    $("notice").textContent = `The model cannot run here (${what}). It needs WebAssembly and its files beside this page. `
      + "The picture shows what it draws.";
  }

  worker.onerror = event => fail(event.message || "the worker did not start");
  worker.onmessage = ({ data: { id, model: opened, ...answer } }) => {
    if (opened) return start(opened);
    if (answer.error) return fail(answer.error);
    answers.get(id)?.(answer);
    if (answer.done) answers.delete(id);
  };

  // pictures: dark ink on white, as everywhere in the book

  function canvas(alt) {
    const made = document.createElement("canvas");
    made.setAttribute("role", "img");
    name(made, alt);
    return made;
  }
  const name = (made, alt) => made.setAttribute("aria-label", alt);

  function paint(made, values, height, width) {
    [made.width, made.height] = [width, height];
    const image = new ImageData(width, height);
    values.forEach((value, i) => image.data.set([...Array(3).fill(255 - (value + 1) * 127.5), 255], 4 * i));
    made.getContext("2d").putImageData(image, 0, 0);
  }
  const picture = (made, images, i) => {
    const [height, width] = model.size;
    paint(made, images.subarray(i * height * width, (i + 1) * height * width), height, width);
  };
  const figure = (made, words) => {
    const whole = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.textContent = words;
    whole.append(made, caption);
    return whole;
  };
  const className = label => label === model.null ? "none" : model.classes[label];
  const number = (value, digits = 3) => (Object.is(value, -0) ? 0 : value).toFixed(digits).replace("-", "−");

  function radios(into, group, names, checked) {
    into.append(...names.map((words, i) => {
      const label = document.createElement("label"), input = document.createElement("input");
      Object.assign(input, { type: "radio", name: group, value: i, checked: i === checked });
      label.append(input, words);
      return label;
    }));
  }

  // drawing

  function settings() {
    const form = new FormData($("draw"));
    return Object.fromEntries(["label", "guidance", "steps", "seed", "order"].map(key => [key, Number(form.get(key))]));
  }

  function outputs() {
    document.querySelectorAll(".play input[type=range]").forEach(input => {
      const digits = input.step.includes(".") ? 2 : 0;
      input.parentElement.querySelector("output").value = Number(input.value).toFixed(digits);
    });
  }

  let frames = [], selected = 0;  // what the film strip shows: [{ t, images }], for one of the pictures

  function film() {
    $("film").replaceChildren(...frames.map(({ t, images }) => {
      const made = canvas(`Estimate at t = ${number(t, 2)}`);
      picture(made, images, selected);
      return figure(made, number(t, 2));
    }));
    $$("pick").forEach((button, i) => button.setAttribute("aria-pressed", i === selected));
  }

  function draw() {
    const chosen = settings(), began = performance.now();
    const fresh = [];
    $("pictures").setAttribute("aria-busy", "true");
    ask("main", "draw", { ...chosen, count: COUNT, frames: FRAMES }, ({ step, t, images, done }) => {
      $("progress").value = step / chosen.steps;
      if (images) {
        fresh.push({ t, images });
        frames = fresh;
        if (done || !still.matches) $$("pick").forEach((button, i) => picture(button.firstChild, images, i));
        film();
      }
      if (!done) return;
      const what = chosen.label === model.null ? "no class asked for" : chosen.guidance === 0 ? "the class is not heard" : `class ${className(chosen.label)}`;
      const cost = evaluations(chosen, model.null);
      $("pictures").setAttribute("aria-busy", "false");
      $("status").textContent = `${COUNT} pictures, ${what}: ${cost} evaluation${cost > 1 ? "s" : ""} of the U-Net for each, `
        + `${((performance.now() - began) / 1000).toFixed(1)} s.`;
      $$("pick").forEach((button, i) => name(button.firstChild, `Picture ${i + 1}, ${what}`));
      $("draw").dataset.done = JSON.stringify(chosen);
    });
  }

  // noising

  function noised() {
    const form = new FormData($("noising")), t = Number(form.get("t")), test = Number(form.get("test"));
    const [alpha, sigma] = cosine(t);
    $("alpha").value = number(alpha);
    $("sigma").value = number(sigma);
    $("snr").value = t === 0 ? "+∞" : t === 1 ? "−∞" : number(logSnr([alpha, sigma]), 2);
    $("dot").setAttribute("cx", 100 * alpha);
    $("dot").setAttribute("cy", -100 * sigma);
    $("legs").setAttribute("d", `M ${100 * alpha} 0 V ${-100 * sigma} H 0`);
    ask("noising", "noised", { t, test, seed: settings().seed }, ({ zt, images }) => {
      const word = className(model.tests[test].label);
      const original = Uint8Array.from(atob(model.tests[test].pixels), c => c.charCodeAt(0));
      const [image, rebuilt, noisy, guess] = $$("panel");
      paint(image, Float32Array.from(original, p => p / 127.5 - 1), ...model.size);
      [rebuilt, noisy, guess].forEach((made, i) => picture(made, images, i));
      [image, rebuilt, noisy, guess].forEach((made, i) => name(made, [
        `A test image, ${word}`, `${word}, rebuilt from its latent`, `The latent with noise at t = ${t}, decoded`,
        `The denoiser's estimate at t = ${t}, decoded`][i]));
      const [channels, height, width] = model.latent, area = height * width;
      $$("channel").slice(0, channels).forEach((made, i) =>
        paint(made, zt.subarray(i * area, (i + 1) * area).map(z => Math.max(-1, Math.min(1, z / 3))), height, width));
      $("noising").dataset.done = JSON.stringify({ t, test });
    });
  }

  // experiments: a button each, a row of pictures for each of its settings

  const drawn = (channel, chosen) => new Promise(resolve =>
    ask(channel, "draw", { ...chosen, count: COUNT, frames: 1 }, answer => answer.done && resolve(answer.images)));

  async function experiment(box, channel) {
    const rows = JSON.parse(box.dataset.rows), button = box.querySelector("button"), table = box.querySelector(".play-rows");
    if (button.ariaDisabled === "true") return;  // and not `disabled`, which would take the focus away
    button.ariaDisabled = table.ariaBusy = "true";
    button.dataset.words ??= button.textContent;
    button.textContent = "Drawing …";
    table.replaceChildren();
    const { seed } = settings();  // one for all rows
    for (const { caption, ...row } of rows) {
      const images = await drawn(channel, { seed, guidance: 1.25, steps: 20, order: 2, ...row });
      const cells = Array.from({ length: COUNT }, (_, i) => {
        const made = canvas(`${caption}, picture ${i + 1}`);
        picture(made, images, i);
        return made;
      });
      const line = document.createElement("div"), words = document.createElement("span");
      words.textContent = caption;
      line.append(words, ...cells);
      table.append(line);
    }
    button.ariaDisabled = table.ariaBusy = "false";
    button.textContent = `${button.dataset.words}, again`;
  }

  function start(opened) {
    model = opened;
    radios($("labels"), "label", [...model.classes, "none"], model.classes.length - 1);  // "none" is the null label
    radios($("tests"), "test", model.tests.map(test => className(test.label)), model.tests.length - 1);
    for (let i = 0; i < COUNT; i++) {
      const button = document.createElement("button");
      Object.assign(button, { type: "button", onclick: () => { selected = i; film(); } });
      button.dataset.play = "pick";
      button.append(canvas(`Picture ${i + 1}`));
      $("pictures").append(button);
    }
    let timer;
    const soon = what => { clearTimeout(timer); timer = setTimeout(what, 60); };
    $("draw").oninput = event => { outputs(); soon(() => { draw(); if (event.target.name === "seed") noised(); }); };
    $("noising").oninput = () => { outputs(); noised(); };
    [$("draw"), $("noising")].forEach(form => form.onsubmit = event => event.preventDefault());
    document.querySelectorAll("[data-rows]").forEach((box, i) => {
      box.querySelector("button").onclick = () => experiment(box, `experiment ${i}`);
    });
    outputs();
    state("ready");
    draw();
    noised();
  }

  state("loading");
  $("notice").textContent = "Loading the model (about 20 MB) …";
}

if (typeof document === "undefined") work().catch(error => postMessage({ error: String(error) }));
else page();
export { cosine, logSnr, timeGrid, noise };
