"""`python -m longroll` and `torchrun -m longroll`: the command line."""

from longroll.launcher import end_with_launcher

end_with_launcher()  # before imports that take seconds

from longroll.cli import main  # noqa: E402

main()
