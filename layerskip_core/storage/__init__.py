"""Files of any kind: read with limits, written aside and renamed, locked."""
