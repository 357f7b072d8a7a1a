"""Models as ONNX, for onnxruntime, optimum and transformers.js."""
