"""Making a model smaller: masks that hold while it trains, weights trained as they will be stored."""
