from erasediff.cli.main import main

main()
