"""sdgm-edge: Spectral Dictionary language models, from a text file to a device.

Importing this package costs nothing: each part is imported where it is used.

- `sdgm_edge.runtime`: run a bundle (numpy, onnxruntime, tokenizers)
- `sdgm_edge.models`: the PyTorch modules
- `sdgm_edge.export`: from a trained run to a bundle
"""

__version__ = "0.1.0"
