"""Side-by-side measurements of this package and of what a user would pick instead. Each question is
one command; see README.md here."""
