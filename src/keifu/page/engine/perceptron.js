// The perceptron (Rosenblatt, 1958): a weighted sum, a threshold, and weights that move only after a mistake.

export class Perceptron {
  constructor(dim) {
    this.weight = new Float64Array(dim);
    this.bias = 0;
  }

  static load(tensors) {
    const weight = tensors.get("weight");
    const perceptron = new Perceptron(weight.length);
    perceptron.weight.set(weight);
    [perceptron.bias] = tensors.get("bias");
    return perceptron;
  }

  sum(x) {
    return x.reduce((total, value, i) => total + value * this.weight[i], this.bias);
  }

  forward(x) {
    return this.sum(x) >= 0 ? 1 : 0;
  }

  // Show one example: after a mistake the weights move by the error times the input. Return the error: 1, 0 or -1.
  correct(x, target) {
    const error = target - this.forward(x);
    x.forEach((value, i) => { this.weight[i] += error * value; });
    this.bias += error;
    return error;
  }

  // Show all examples in turn, pass after pass; yield after each correction. A pass without a mistake ends it.
  * learn(inputs, targets, mostPasses = 20) {
    for (let pass = 0; pass < mostPasses; pass++) {
      let mistakes = 0;
      for (let i = 0; i < inputs.length; i++) {
        const error = this.correct(inputs[i], targets[i]);
        if (!error) continue;
        mistakes++;
        yield { example: i, error, pass };
      }
      if (!mistakes) return true;
    }
    return false;
  }
}
