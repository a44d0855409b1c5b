"""Prints, as one JSON line, what a script sees of its surroundings; then unpickles an object of its own class."""

import json
import pickle
import sys


class Mine:
    pass


if __name__ == "__main__":
    main = sys.modules["__main__"]
    print(
        json.dumps(
            {
                "argv": sys.argv,
                "path": sys.path[0],
                "main": main.__file__,
                "own class": isinstance(pickle.loads(pickle.dumps(Mine())), Mine),
            }
        )
    )
