"""What marks exercises: the sandbox, the manifests, the checks, the marking."""
