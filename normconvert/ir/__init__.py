"""The data that the stages exchange: frozen, small, printable, standard library only."""
