"""The learning rules of `relaxprop.rules`, each beside a law, a literal loop and a formula of its own."""
