"""Runs the study: its workers import it by name, which they can't a package's `__main__`."""

from benchmarks.studies.methods.study import main

if __name__ == "__main__":
    main()
