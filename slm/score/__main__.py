"""`python -m slm.score`, which `slm score` runs."""

from slm.score.command import main

if __name__ == "__main__":
    main()
