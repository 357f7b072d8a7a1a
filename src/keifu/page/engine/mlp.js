// The multi-layer network (Rumelhart, Hinton and Williams, 1986): layers of weights with an activation between them.

import { ModelError, relu, sigmoid, softmax } from "./tensors.js";

const ACTIVATIONS = { relu, sigmoid, tanh: Math.tanh, identity: (x) => x };

export class MLP {
  constructor(tensors, config) {
    if (!(config.activation in ACTIVATIONS)) throw new ModelError(`The engine knows no activation ${config.activation}.`);
    this.tensors = tensors;
    this.config = config;
    this.activation = ACTIVATIONS[config.activation];
    this.nLayers = config.hidden_dims.length + 1;
  }

  // The outputs for one input of `dim` numbers; watch.hidden(layer, states) sees each hidden layer.
  forward(x, watch = {}) {
    const { tensors } = this;
    let y = Float32Array.from(x);
    if (tensors.has("mean")) {
      const [mean, scale] = [tensors.get("mean"), tensors.get("scale")];
      y = y.map((value, i) => (value - mean[i]) / scale[i]);
    }
    for (let layer = 0; layer < this.nLayers; layer++) {
      y = tensors.linear(y, `layers.${layer}.weight`, `layers.${layer}.bias`);
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
