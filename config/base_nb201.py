# Trains a cell of NAS-Bench-201 on CIFAR-10 as its benchmark was: like NATS-Bench, 200 epochs.
# python train_base.py config/base_nb201.py --arch=out/search_nb201_drnas/arch.json
include('base_nats_size.py')
out_dir = 'out/base_nb201'
init_channels = 16
n_cell = 5
partial_channels = 1
max_iters = 39000
