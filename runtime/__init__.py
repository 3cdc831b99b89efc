"""Run a bundle: text generation with numpy, onnxruntime and tokenizers alone."""
