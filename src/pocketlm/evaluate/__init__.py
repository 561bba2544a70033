"""One protocol for every model: perplexity, divergence from the original, speed, memory."""
