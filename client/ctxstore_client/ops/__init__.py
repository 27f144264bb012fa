"""Operations of the client as plans: generators that yield I/O requests and return the result.

Owns what is sent in which order, and what each answer means. It never touches a socket, a thread or
a clock: a driver executes the requests, and both faces of the client execute the same plans.
"""
