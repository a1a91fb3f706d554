"""Program to Program: rewriting, calibrating, quantising, lowering and proving graphs."""
