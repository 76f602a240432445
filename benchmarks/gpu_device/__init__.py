"""What the GPU kernels do on a device: correctness, speed and serving, in one file to send back."""
