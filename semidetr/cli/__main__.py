"`python -m semidetr.cli`: the command `semidetr`, for launchers that start a module"
from semidetr.cli.commands import main

main()
