"""The LoRA layers' Triton kernels. With s' = scaling / (1 - p), and a keep-mask of zeros and ones:

    forward   S  = s' (X ∘ keep) A^T             Y  = X W^T + bias + S B^T
    backward  dS = s' dY B                       dX = dY W + (dS A) ∘ keep
              dA = dS^T (X ∘ keep)               dB = dY^T S

The first row's formulas hold for both directions, in the names that kernels have for the roles:

    S = s' (X ∘ keep) DOWN^T                     Y = X W^T + bias + (S UP^T) ∘ keep

    forward   X is X, W is W, DOWN [R, K] is A, UP [N, R] is B; the first mask drops
    backward  X is dY, W is W^T, DOWN is B^T, UP is A^T, S is dS, Y is dX; the second mask drops

So one kernel serves both: backward reads W, A and B through swapped strides. S and dS are scaled in
float32 and rounded once. In float16, s' > 1 could make S overflow where Y does not, so S is stored
in units of a power of two, UNIT; what is computed from S is multiplied by it, exactly, in float32.

    linear                Y and dX on any GPU          thin_products   S and dS, dA and dB
    linear_split_k        for few rows                 product         what the kernels of Y share
    linear_tma            on Hopper and Blackwell      chain           the order of programs
    linear_quantized      from a quantized W           gated, gate_up  a gated MLP
    jobs                  what each job takes          tickets         a program's next tile
    cross_entropy         the loss of a head's Y

Mostly, dA and dB take no launch of their own: dB is computed with dS, since both read dY, and
programs for dA run with those for dX. Arguments that several kernels take:

    M, N                  rows of X, columns of Y; x.width is K, the columns of X
    z                     what dA reads beside S: backward's X, or a gated MLP's G and U
    threshold             dropout: the number below which 15 random bits drop an element
    SPLITS                programs that share a tile's sum, through parts (float32 scratch) and
                          counter (int32 zeros)
    branch, BRANCH        S UP^T, of S that is read, or that a program of few rows computes
    chain                 with S: this launch has S_PROGRAMS for S and dB too, in the order that
                          ``chain`` makes
    PRODUCTS              programs of the product; those of dA follow
    tickets               the counter by which these programs draw tiles, where a program may take
                          several
    base                  added to Y, of Y's strides: Y's own memory, or another tensor's

``do_not_specialize``: otherwise Triton recompiles for M = 1, for multiples of 16 and for the rest.
"""
