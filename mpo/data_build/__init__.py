"""`mpo data build`: from preference pairs in one language to rows that MPO trains on."""
