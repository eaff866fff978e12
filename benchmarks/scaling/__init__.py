"""Measures layers, training steps, links and memory on several GPUs, and predicts steps on more of them."""
