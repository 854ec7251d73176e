// The page: a sheet to draw on, and what the network makes of it.

import * as ort from "./ort.wasm.bundle.min.mjs";
import { IMAGE, SIDE, draw, toImage } from "./drawing.js";

const [sheet, seen, clear, answer, bars] = ["sheet", "seen", "clear", "answer", "bars"].map((id) =>
  document.getElementById(id),
);
sheet.width = sheet.height = SIDE;
seen.width = seen.height = IMAGE;
const paper = sheet.getContext("2d");
let strokes = [];
let network = null; // a function from an image to its probabilities
let [busy, stale] = [false, false];

function say(text) {
  // Written only where it differs, so that a screen reader is not told the same again.
  if (answer.textContent !== text) answer.textContent = text;
}

function show(image, probabilities, names) {
  const pixels = seen.getContext("2d").createImageData(IMAGE, IMAGE);
  pixels.data.forEach((_, i) => (pixels.data[i] = i % 4 === 3 ? 255 : 255 * (image?.[i >> 2] ?? 0)));
  seen.getContext("2d").putImageData(pixels, 0, 0);
  names.forEach((_, k) => {
    const [, bar, number] = bars.rows[k].cells;
    const probability = probabilities?.[k] ?? 0;
    bar.firstChild.value = probability;
    number.textContent = probabilities ? `${(100 * probability).toFixed(1)}%` : "";
  });
  if (!probabilities) return say(strokes.length ? "That is no digit yet." : "Draw one digit.");
  say(`It is ${names[probabilities.indexOf(Math.max(...probabilities))]}.`);
}

// Asks the network about what is drawn. Strokes that come while it works are asked about after it,
// all at once: a session runs one image at a time.
async function ask() {
  stale = true;
  if (busy || !network) return;
  busy = true;
  while (stale) {
    stale = false;
    const image = toImage(strokes);
    show(image, image && (await network.probabilities(image)), network.names);
  }
  busy = false;
}

function redraw() {
  paper.fillStyle = "white";
  paper.fillRect(0, 0, SIDE, SIDE);
  draw(paper, strokes);
  ask();
}

function point(event) {
  const frame = sheet.getBoundingClientRect();
  const scale = (offset, length) => Math.min(Math.max((SIDE * offset) / length, 0), SIDE);
  return [
    scale(event.clientX - frame.left, frame.width),
    scale(event.clientY - frame.top, frame.height),
  ];
}

function erase() {
  strokes = [];
  redraw();
}

sheet.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button) return; // a second finger, or another button
  sheet.setPointerCapture(event.pointerId); // the stroke goes on beyond the sheet's edge
  strokes.push([point(event)]);
  redraw();
});
sheet.addEventListener("pointermove", (event) => {
  if (!sheet.hasPointerCapture(event.pointerId)) return;
  // A browser joins the movements between two frames into one event; a fast stroke needs them all.
  const events = event.getCoalescedEvents?.() ?? [];
  strokes.at(-1)?.push(...(events.length ? events : [event]).map(point)); // none: erased amid it
  redraw();
});
// A stroke is no swipe: the browser would take a tap on Clear soon after it for the end of that.
sheet.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
clear.addEventListener("click", erase);
document.addEventListener("keydown", (event) => event.key === "Escape" && erase());

function makeBars(names) {
  for (const name of names) {
    const row = bars.insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    const bar = document.createElement("progress");
    bar.setAttribute("aria-label", name);
    row.insertCell().append(bar);
    row.insertCell();
  }
}

async function load() {
  ort.env.wasm.numThreads = 1; // more need headers that not every host lets one set
  const response = await fetch("classes.json");
  if (!response.ok) throw new Error(`classes.json: ${response.status}`);
  const names = await response.json();
  const session = await ort.InferenceSession.create("model.onnx", { executionProviders: ["wasm"] });
  makeBars(names);
  const probabilities = async (image) => {
    const images = new ort.Tensor("float32", image, [1, IMAGE, IMAGE, 1]);
    const logits = (await session.run({ images }))[session.outputNames[0]].data;
    const largest = Math.max(...logits); // subtracted, so that no exponential overflows
    const powers = Array.from(logits, (logit) => Math.exp(logit - largest));
    const sum = powers.reduce((a, b) => a + b);
    return powers.map((power) => power / sum);
  };
  network = { names, probabilities };
  await ask();
}

redraw();
load().catch((error) => say(`The network could not be loaded: ${error.message}`));
