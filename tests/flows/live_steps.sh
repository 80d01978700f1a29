# Drives live_sleep.py as a scheduler does: every task is a process of its own, with ids that it names.
# $1 is Python, $2 the run id; after each process there is a note, and the next waits for the word of the test.
next() { touch "$NOTES/after-$1"; while ! [ -e "$NOTES/then-$1" ]; do sleep 0.05; done; }
"$1" live_sleep.py init --run-id "$2" --task-id first || exit 1
next init
"$1" live_sleep.py step start --run-id "$2" --task-id second --input-paths "$2/_parameters/first" || exit 1
next start
"$1" live_sleep.py step end --run-id "$2" --task-id third --input-paths "$2/start/second"
