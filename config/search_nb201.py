# NAS-Bench-201 on CIFAR-10 with the published settings of DrNAS; one GPU.
# python prepare.py --dataset=cifar10
# python train_search.py config/search_nb201.py config/drnas.py
# On 4 GPUs:
# torchrun --standalone --nproc_per_node=4 train_search.py config/search_nb201.py --gradient_accumulation_steps=4 --batch_size=16
# Published test accuracies in % (DrNAS' README):
# DrNAS 94.36, PC-DARTS 93.41, SNAS 92.77, DARTS 54.30; the best cell of all 94.37.
include('shared/cifar10.py')
include('shared/drnas_settings.py')
space = 'nb201'
out_dir = 'out/search_nb201'
affine = False
