"""A fuzzer: random problems, an oracle of its own, and laws that hold for each of them."""
