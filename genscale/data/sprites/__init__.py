"""Moving shapes with captions, and the tracker that reads them back from clips."""
