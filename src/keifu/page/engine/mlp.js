// The multi-layer network (Rumelhart, Hinton and Williams, 1986): layers of weights with an activation between them.

import { Module, relu, sigmoid, softmax } from "./layers.js";
import { ModelError } from "./tensors.js";

const ACTIVATIONS = { relu, sigmoid, tanh: Math.tanh, identity: (x) => x };

export class MLP extends Module {
  constructor(tensors, config) {
    super(tensors, config);
    if (!(config.activation in ACTIVATIONS)) throw new ModelError(`The engine knows no activation ${config.activation}.`);
    this.activation = ACTIVATIONS[config.activation];
    this.nLayers = config.hidden_dims.length + 1;
  }

  // The outputs for one input of `dim` numbers; watch.hidden(layer, states) sees each hidden layer.
  forward(x, watch = {}) {
    let y = Float32Array.from(x);
    if (this.has("mean")) {
      const [mean, scale] = ["mean", "scale"].map((name) => this.get(name));
      y = y.map((value, i) => (value - mean[i]) / scale[i]);
    }
    for (let layer = 0; layer < this.nLayers; layer++) {
      y = this.linear(y, `layers.${layer}`);
      if (layer < this.nLayers - 1) {
        y = y.map(this.activation);
        watch.hidden?.(layer, y);
      }
    }
    return y;
  }

  probabilities(x, watch) {
    return softmax(this.forward(x, watch));
  }
}
