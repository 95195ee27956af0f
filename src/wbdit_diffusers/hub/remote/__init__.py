"""The modules that `wbdit push --with_code` adds to a repository."""
