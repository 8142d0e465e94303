"""EDM's published networks: reading their pickles without running them, and the networks themselves."""
