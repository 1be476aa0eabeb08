"""Stage two, pure maths: how latents are noised, what a network learns from that, and how samples are drawn."""
