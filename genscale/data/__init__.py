"""Images in, batches with global sample ids out."""
