"""One architecture a file: single-device torch, no guidance, loss or noise schedule."""
