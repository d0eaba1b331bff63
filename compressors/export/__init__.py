"""Writing a compressed model down: ONNX for ONNX Runtime, packed safetensors for everything else."""
