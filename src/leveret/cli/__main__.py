"""`python -m leveret.cli`"""

from leveret.cli import main

main()
