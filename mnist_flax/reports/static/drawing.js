// A drawing as an image like MNIST's: what mnist_flax/reports/digits.py does to a clean drawing.
// A stroke is an array of points [x, y] in pixels of the sheet.

export const SIDE = 400; // of the sheet, in pixels
export const IMAGE = 28; // side of the network's image
const PEN = 22; // width of a stroke on the sheet
const BOX = 20; // side of the box that a digit is scaled into
const MARGIN = 40; // around the sheet, for strokes that are thickened at its edge
// As in digits.py, where the reasons are.
const STROKE = 0.13;
const MAX_FILL = 0.72;
const MIN_HEIGHT = 0.4;

// Draws strokes of a width onto a canvas' context.
export function draw(context, strokes, width = PEN) {
  context.lineWidth = width;
  context.lineCap = context.lineJoin = "round";
  for (const [first, ...others] of strokes) {
    context.beginPath();
    context.moveTo(...first);
    // A tap is a line of no length, which the round caps make a dot.
    for (const point of others.length ? others : [first]) context.lineTo(...point);
    context.stroke();
  }
}

// Returns the image, 28 x 28 numbers in [0, 1] row by row, or null where there is no digit.
export function toImage(strokes) {
  let ink = render(strokes, PEN);
  let box = bounds(ink);
  if (!box) return null;
  const longer = Math.max(box.width, box.height);
  const blot = box.filled > MAX_FILL && Math.min(box.width, box.height) > longer / 2;
  if (blot || box.height < MIN_HEIGHT * box.width) return null;
  // Towards MNIST's width of a stroke: a small digit's are thinned, a large one's thickened. The
  // strokes are known, so that they are drawn again, where a photograph's need morphology.
  let width = PEN;
  if (PEN < 0.6 * STROKE * longer) width = 0.8 * STROKE * longer;
  if (PEN > 1.8 * STROKE * longer) width = 1.5 * STROKE * longer;
  if (width !== PEN) {
    ink = render(strokes, width);
    box = bounds(ink);
    if (!box) return null;
  }
  return centre(brighten(shrink(ink, box)));
}

// Returns how much ink is in each pixel of the sheet and its margin, in [0, 1].
function render(strokes, width) {
  const side = SIDE + 2 * MARGIN;
  const canvas = new OffscreenCanvas(side, side);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.translate(MARGIN, MARGIN);
  draw(context, strokes, width);
  const { data } = context.getImageData(0, 0, side, side);
  const values = new Float32Array(side * side);
  for (let i = 0; i < values.length; i++) values[i] = data[4 * i + 3] / 255; // of R, G, B, alpha
  return { side, values };
}

// Returns the box around the ink, and what share of it is filled; null where there is no ink.
function bounds({ side, values }) {
  let [top, bottom, left, right, count] = [side, -1, side, -1, 0];
  values.forEach((value, i) => {
    if (value <= 0.5) return;
    const [y, x] = [Math.floor(i / side), i % side];
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
    [left, right] = [Math.min(left, x), Math.max(right, x)];
    count += 1;
  });
  if (!count) return null;
  const [height, width] = [bottom - top + 1, right - left + 1];
  return { top, left, height, width, filled: count / (height * width) };
}

// Scales the box to 20 pixels on its longer side; each is the mean of those that fall into it.
function shrink({ side, values }, { top, left, height, width }) {
  const scale = BOX / Math.max(height, width);
  const rows = Math.max(1, Math.round(height * scale));
  const columns = Math.max(1, Math.round(width * scale));
  const [sums, counts] = [new Float32Array(rows * columns), new Float32Array(rows * columns)];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const row = Math.floor(((y + 0.5) * rows) / height);
      const cell = row * columns + Math.floor(((x + 0.5) * columns) / width);
      sums[cell] += values[(top + y) * side + left + x];
      counts[cell] += 1;
    }
  }
  return { rows, columns, values: sums.map((sum, i) => sum / counts[i]) };
}

// Scales the ink so that its 90th percentile is 1: thin strokes have grown pale.
function brighten({ rows, columns, values }) {
  const inked = values.filter((value) => value > 0.1).sort();
  const strong = Math.max(inked[Math.floor(0.9 * (inked.length - 1))] ?? 0, 0.3);
  return { rows, columns, values: values.map((value) => Math.min(value / strong, 1)) };
}

// Puts the centre of mass into the middle of the image, as nearly as whole pixels and its edges let.
function centre({ rows, columns, values }) {
  let [mass, massY, massX] = [0, 0, 0];
  values.forEach((value, i) => {
    mass += value;
    massY += value * Math.floor(i / columns);
    massX += value * (i % columns);
  });
  const place = (moment, size) =>
    Math.min(Math.max(Math.round((IMAGE - 1) / 2 - moment / mass), 0), IMAGE - size);
  const [top, left] = [place(massY, rows), place(massX, columns)];
  const image = new Float32Array(IMAGE * IMAGE);
  values.forEach((value, i) => {
    const at = (top + Math.floor(i / columns)) * IMAGE + left + (i % columns);
    image[at] = Math.round(255 * value) / 255; // 8 bits, as what the network was trained on
  });
  return image;
}
