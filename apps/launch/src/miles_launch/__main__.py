"""`python -m miles_launch` is the `miles` command."""

from miles_launch import main

if __name__ == "__main__":
    main()
