"""What every stage stands on: parameters, atomic files, scratch folders, progress, the frame of a stage."""
