/* The images as bytes of the library: a compiler would take minutes for an array of so many numbers. */
    .section .rodata
    .balign 64
    .globl polyvit_cubins
    .hidden polyvit_cubins
polyvit_cubins:
    .incbin "polyvit_cubins.bin"
    .section .note.GNU-stack, "", %progbits
