// A network of a few hundred or thousand weights that is trained in the page: tanh between its layers, and Adam.

// Random numbers from a seed: uniform ones between 0 and 1, and normal ones.
export function generator(seed) {
  let state = seed;
  const uniform = () => ((state = (Math.imul(state, 1664525) + 1013904223) >>> 0) + 0.5) / 2 ** 32;
  return { uniform, normal: () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()) };
}

export class SmallNetwork {
  constructor(sizes, { normal }) { // sizes: of the input, the hidden layers and the output
    this.layers = sizes.slice(1).map((outputs, i) => {
      const inputs = sizes[i]; // a row of weights for each output, and its bias at the end
      const weights = Float64Array.from({ length: outputs * (inputs + 1) }, () => normal() / Math.sqrt(inputs));
      const zeros = () => new Float64Array(weights.length);
      return { inputs, outputs, weights, gradient: zeros(), mean: zeros(), square: zeros() };
    });
    this.updates = 0;
  }

  get size() { return this.layers.reduce((sum, { weights }) => sum + weights.length, 0); }

  // The input and the state after each layer; the last one is the output.
  forward(x) {
    const states = [[...x]];
    for (const { inputs, outputs, weights } of this.layers) {
      const [below, state] = [states.at(-1), new Array(outputs)];
      const last = states.length === this.layers.length;
      for (let j = 0, at = 0; j < outputs; j++) {
        let sum = 0;
        for (let i = 0; i < inputs; i++) sum += weights[at++] * below[i];
        sum += weights[at++];
        state[j] = last ? sum : Math.tanh(sum);
      }
      states.push(state);
    }
    return states;
  }

  // Add the gradient of each weight. delta: the loss's gradient at the output. Return the one at the input.
  backward(states, delta) {
    for (let depth = this.layers.length - 1; depth >= 0; depth--) {
      const { inputs, outputs, weights, gradient } = this.layers[depth];
      const [below, next] = [states[depth], new Array(inputs).fill(0)];
      for (let j = 0, at = 0; j < outputs; j++) {
        for (let i = 0; i < inputs; i++, at++) {
          gradient[at] += delta[j] * below[i];
          next[i] += delta[j] * weights[at];
        }
        gradient[at++] += delta[j];
      }
      if (depth) for (let i = 0; i < inputs; i++) next[i] *= 1 - below[i] ** 2;
      delta = next;
    }
    return delta;
  }

  forget() { for (const { gradient } of this.layers) gradient.fill(0); }

  // One step of Adam with the gradients, which are forgotten.
  update(rate, [first, second] = [0.9, 0.99]) {
    this.updates++;
    const [whole, wholeSquare] = [1 - first ** this.updates, 1 - second ** this.updates];
    for (const { weights, gradient, mean, square } of this.layers) {
      for (let i = 0; i < weights.length; i++) {
        mean[i] = first * mean[i] + (1 - first) * gradient[i];
        square[i] = second * square[i] + (1 - second) * gradient[i] ** 2;
        weights[i] -= (rate * mean[i]) / whole / (Math.sqrt(square[i] / wholeSquare) + 1e-8);
      }
    }
    this.forget();
  }
}

// Points of a shape in a plane, from -1.4 to 1.4.
export const SHAPES = {
  ring: (u, { normal }) => [Math.cos(2 * Math.PI * u) + 0.05 * normal(), Math.sin(2 * Math.PI * u) + 0.05 * normal()],
  clusters: (u, { normal }) => [(u < 0.5 ? -0.9 : 0.9) + 0.12 * normal(), ((4 * u) % 2 < 1 ? -0.9 : 0.9) + 0.12 * normal()],
  line: (u, { normal }) => [2.6 * u - 1.3, Math.sin(5 * u - 2.5) + 0.05 * normal()],
};

export const shapePoints = (shape, count, random) => Array.from({ length: count }, () => SHAPES[shape](random.uniform(), random));

// A canvas of the plane from -2 to 2.
export class Plane {
  constructor(canvas, side = 300) {
    canvas.width = canvas.height = this.side = side;
    this.pen = canvas.getContext("2d");
  }

  at([x, y]) { return [((x + 2) / 4) * this.side, ((2 - y) / 4) * this.side]; }

  clear(colour = "#fff") {
    this.pen.fillStyle = colour;
    this.pen.fillRect(0, 0, this.side, this.side);
  }

  dots(points, colour) {
    this.pen.fillStyle = colour;
    for (const point of points) {
      const [left, top] = this.at(point);
      this.pen.fillRect(left - 2, top - 2, 4, 4);
    }
  }

  line(points, colour) {
    this.pen.strokeStyle = colour;
    this.pen.lineWidth = 1.5;
    this.pen.beginPath();
    for (const point of points) this.pen.lineTo(...this.at(point));
    this.pen.stroke();
    this.dots(points.slice(-1), colour);
  }

  arrow(from, to, colour) {
    this.pen.strokeStyle = this.pen.fillStyle = colour;
    this.pen.beginPath();
    this.pen.moveTo(...this.at(from));
    this.pen.lineTo(...this.at(to));
    this.pen.stroke();
    this.pen.beginPath();
    this.pen.arc(...this.at(to), 2.5, 0, 2 * Math.PI);
    this.pen.fill();
  }
}
