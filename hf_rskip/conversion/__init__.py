"""From trained models of other kinds to models of this package, and from K recursions to more."""
