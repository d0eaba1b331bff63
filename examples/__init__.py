"""Nets of one's own, as `tightrope search` takes them: each module has a `build` and a `splits`, each YAML names them."""
