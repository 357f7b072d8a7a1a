// What pictures are made from and read as: noise, and normalised pixels.

// Normal numbers from a seed (mulberry32, then Box and Muller). They are not keifu's: PyTorch's generator is another.
export function normals(count, seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return Float32Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}

// Bytes of RGBA (a canvas) of the right size as normalised pixels [3, side, side].
export function normalise(rgba, { image_mean: mean, image_std: std }) {
  const count = rgba.length / 4;
  return Float32Array.from({ length: 3 * count }, (_, i) => {
    const channel = Math.floor(i / count);
    return (rgba[4 * (i % count) + channel] / 255 - mean[channel]) / std[channel];
  });
}
