"""Make any PyTorch model smaller and faster on a CPU, and measure what it cost."""
