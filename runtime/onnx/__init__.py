"""ONNX models that ONNX Runtime really runs in integers, checked against the Program they came from."""
