"""`outlay check`: what a configuration that somebody already has means, breaks, needs, and how it is mended."""
