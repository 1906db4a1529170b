// Enlarging by Lanczos as Pillow does it: along rows, then along columns, to whole values after each.

const sinc = x => (x ? Math.sin(Math.PI * x) / (Math.PI * x) : 1);
const lanczos = x => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0);

// For each of `to` places, the first of `from` values that it is made of, and their weights.
function places(from, to) {
  return Array.from({length: to}, (_, i) => {
    const centre = ((i + 0.5) * from) / to,
      first = Math.max(0, Math.trunc(centre - 2.5)),
      last = Math.min(from, Math.trunc(centre + 3.5));
    const weights = Array.from({length: last - first}, (_, k) => lanczos(first + k + 0.5 - centre));
    const sum = weights.reduce((a, b) => a + b);
    return [first, weights.map(weight => weight / sum)];
  });
}

// RGBA with one axis enlarged: its pixels are `step` values apart, before and after, and its lines `pitch`.
function along(values, from, to, lines, [step, pitch], [newStep, newPitch]) {
  const found = new Uint8ClampedArray(4 * to * lines);
  places(from, to).forEach(([first, weights], i) => {
    for (let line = 0; line < lines; line++)
      for (let channel = 0; channel < 4; channel++) {
        let sum = 0;
        weights.forEach((weight, k) => (sum += weight * values[(first + k) * step + line * pitch + channel]));
        found[i * newStep + line * newPitch + channel] = sum;
      }
  });
  return found;
}

async function enlarged(uri, width, height) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  const canvas = document.createElement("canvas"),
    {naturalWidth: w, naturalHeight: h} = image;
  [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const rows = along(context.getImageData(0, 0, w, h).data, w, width, h, [4, 4 * w], [4, 4 * width]);
  const whole = along(rows, h, height, width, [4 * width, 4], [4 * width, 4]);
  [canvas.width, canvas.height] = [width, height];
  context.putImageData(new ImageData(whole, width, height), 0, 0);
  return canvas.toDataURL();
}
