"""From trained models of other kinds to models of this package, to more recursions, and to ONNX."""
