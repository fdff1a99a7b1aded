"""Raw labels, captions and sizes -> Conditioning."""
